"""A search with Ray Tune, with early stopping (ASHA); its trials, processes of one node, share their prep.

python examples/ray_tune_search.py          (pip install 'coordlfs[loader]' 'ray[tune]')

Ray runs a trial in a process of its own and ends it without asking once it falls behind: the others prepare what it
left, and wait for nobody.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import closing
from typing import Any

import ray
from coordlfs_loader import CoordinatedLoader
from pictures import Pictures, train
from ray import tune
from ray.tune.schedulers import ASHAScheduler

GROUP = "ray-tune-example"


def trial(config: dict[str, Any]) -> None:
    """One trial: it reports its accuracy after every epoch."""
    # Every trial of the node gives the same group, data set, batch size and seed. Nothing else is needed to share.
    # On several nodes, the trials of each node share.
    with closing(
        CoordinatedLoader(Pictures(config["samples"]), batch_size=32, group=GROUP, num_workers=1, shuffle=True, seed=0)
    ) as loader:
        for accuracy in train(loader, config["rate"], config["epochs"]):
            tune.report({"accuracy": accuracy})


def main() -> None:
    """Search, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--at-once", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1920)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--dir", help="where Ray keeps its files and sockets; a short path (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ray-", dir=arguments.dir) as directory:
        # A node of our own, which ends with us, and no more memory than this needs.
        ray.init(
            address="local",
            num_cpus=arguments.at_once,
            object_store_memory=80_000_000,
            include_dashboard=False,
            _temp_dir=directory,
        )
        try:
            results = search(arguments, directory)
        finally:
            ray.shutdown()
    for result in results:
        print(
            f"rate {result.config['rate']:.4f}: accuracy {result.metrics['accuracy']:.2f} "
            f"after {result.metrics['training_iteration']} epochs"
        )
    best = results.get_best_result("accuracy", "max")
    print(
        f"best of {len(results)} trials: rate {best.config['rate']:.4f} "
        f"with an accuracy of {best.metrics['accuracy']:.2f}"
    )


def search(arguments: argparse.Namespace, directory: str) -> tune.ResultGrid:
    """Let Ray Tune run the trials."""
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={
            "rate": tune.loguniform(1e-3, 1),
            "samples": arguments.samples,
            "epochs": arguments.epochs,
        },
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            num_samples=arguments.trials,
            max_concurrent_trials=arguments.at_once,
            scheduler=ASHAScheduler(max_t=arguments.epochs, grace_period=1, reduction_factor=2),
        ),
        run_config=tune.RunConfig(name="stripes", storage_path=f"{directory}/results", verbose=1),
    )
    return tuner.fit()


if __name__ == "__main__":
    main()
