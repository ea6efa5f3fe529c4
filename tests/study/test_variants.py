from regrow.study.variants import variant_names


def test_a_method_alone_keeps_its_name() -> None:
    settings = {
        1: {"method": "standard", "seed": 0, "fraction": 0.1},
        2: {"method": "standard", "seed": 1, "fraction": 0.2},
        3: {"method": "repr", "seed": 0, "fraction": 0.2},
    }
    assert variant_names(settings) == {1: "standard", 2: "standard", 3: "repr"}


def test_variants_are_called_after_what_differs() -> None:
    repr_ = {"method": "repr", "fraction": 0.2, "criterion": "ortho", "skip_first": True, "p": 0.1}
    settings = {
        "a": repr_,
        "b": {**repr_, "fraction": 0.5, "p": 0.7, "seed": 1},
        "c": {**repr_, "fraction": 0.5, "skip_first": False},
        "d": {"method": "dropout", "p": 0.1, "weight_decay": 0.01},
        "e": {"method": "dropout", "p": 0.1, "weight_decay": 0.0},
    }
    assert variant_names(settings) == {
        "a": "RePr, fraction 0.2, skip first yes",
        "b": "RePr, fraction 0.5, skip first yes",
        "c": "RePr, fraction 0.5, skip first no",
        "d": "Dropout, weight decay 0.01",
        "e": "Dropout, weight decay 0",
    }
