"""A report of ``regrow prune`` with a layer whose name is HTML: a page must show it as text."""

HOSTILE = "<b onclick=alert(1)>&\"'"
LATENCY = {"median": 0.002, "lowest": 0.0015, "highest": 0.0125, "passes": 50}
NETWORK_KEYS = ("network", "validation_accuracy", "test_accuracy", "macs", "latency", "file_size")
NETWORKS = [
    ("uncut", 0.977, 0.986, 200_000, 0.002, 79_616),
    ("cut", 0.607, 0.529, 100_000, 0.001, 41_064),
    ("cut and reconstructed", 0.9765, 0.985, 100_000, 0.001, 41_064),
]
REPORT = {
    "version": 1,
    "target": {"kind": "max_drop", "value": 1.0, "reached": 0.05},
    "settings": {"criterion": "l2", "floor": 0.1, "exclude": [HOSTILE], "deployed": None, "seed": None},
    "filters": {"before": 64, "after": 38},
    "layers": {
        "a": {"before": 64, "after": 38},
        HOSTILE: {"before": 8, "after": 8},
        "c.0.depthwise": {"before": 9, "after": 6},
    },
    "left_out": {HOSTILE: "excluded", "c.0.depthwise": "grouped"},
    "masked": {"c.0.depthwise": "not confirmed"},
    "parameters": {"before": 11_700_000, "after": 5_850_000},
    "macs": {"before": 200_000, "after": 100_000},
    "latency": {"before": LATENCY, "after": LATENCY | {"median": 0.001, "highest": 0.0012, "lowest": 0.0009}},
    "memory": {
        "weights": {"before": 46_800_000, "after": 23_400_000},
        "activations": {"before": 524_288, "after": 524_288},
    },
    "accuracy": {"before": 0.977, "after": 0.9765, "images": 359},
    "test_accuracy": {"before": 0.986, "after": 0.985, "images": 359},
    "compensation": {
        "method": "least-squares",
        "layers": {
            HOSTILE: {"how": "least squares", "penalty": 0.1, "error": 0.25},
            "head": {"how": "mean", "penalty": 1.0, "error": 0.5},
        },
        "unfolded": {"c.0.depthwise": "it shares its weight with another layer"},
        "images": 512,
    },
    "tried": [
        {"filters": 30, "macs": 0.45, "value": 3.0, "accuracy": 0.947},
        {"filters": 26, "macs": 0.51, "value": 0.05, "accuracy": 0.9765},
    ],
    "networks": [dict(zip(NETWORK_KEYS, row, strict=True)) for row in NETWORKS],
    "source": {"run": "runs/one", "weights": "abc", "data": "digits"},
    "environment": {"version": 1, "regrow": "9.9", "torch": "2.0", "command": f"regrow prune {HOSTILE}"},
}
