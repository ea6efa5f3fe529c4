"""How often the t interval and the bootstrap interval of the report contain the true mean.

    python benchmarks/interval_coverage.py

Each sample has as many differences as there are seeds, drawn from a normal distribution whose mean is 0.
"""

import numpy as np

from regrow.study.paired import bootstrap_interval, t_interval

SAMPLES, SEEDS = 2000, (3, 5, 10, 20)


def main() -> None:
    """Draw the samples, and print a row for each interval."""
    rng = np.random.default_rng(0)
    drawn = [rng.standard_normal((SAMPLES, seeds)).tolist() for seeds in SEEDS]
    print("| seeds | " + " | ".join(map(str, SEEDS)) + " |")
    for name, interval in (("t interval", t_interval), ("bootstrap", bootstrap_interval)):
        hits = [[low < 0 < high for low, high in map(interval, samples)] for samples in drawn]
        print(f"| {name} | " + " | ".join(f"{np.mean(each):.1%}" for each in hits) + " |")


if __name__ == "__main__":
    main()
