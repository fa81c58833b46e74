"""A search with Optuna whose trials run in processes of their own on one node, and share their prep.

python examples/optuna_search.py            (pip install 'coordlfs[loader]' optuna)

The processes share the study, a journal file, and their loaders find each other by the group's name. Trials begin and
end when they like, and are pruned: each still gets every batch of its epochs once.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import tempfile
from contextlib import closing
from pathlib import Path

import optuna
from coordlfs_loader import CoordinatedLoader
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from pictures import Pictures, train

GROUP = "optuna-example"


def objective(trial: optuna.Trial, *, samples: int, epochs: int) -> float:
    """One trial: the accuracy that its learning rate leads to."""
    rate = trial.suggest_float("rate", 1e-3, 1, log=True)
    accuracy = 0.0
    # Every trial of the node gives the same group, data set, batch size and seed. Nothing else is needed to share.
    with closing(
        CoordinatedLoader(Pictures(samples), batch_size=32, group=GROUP, num_workers=1, shuffle=True, seed=0)
    ) as loader:
        for epoch, accuracy in enumerate(train(loader, rate, epochs)):
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
    return accuracy


def open_study(path: Path) -> optuna.Study:
    """The study that all processes work on."""
    return optuna.create_study(
        study_name="stripes",
        storage=JournalStorage(JournalFileBackend(str(path))),
        direction="maximize",
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
        load_if_exists=True,
    )


def work(path: Path, trials: int, samples: int, epochs: int) -> None:
    """What one process does: trials, one after another."""
    open_study(path).optimize(lambda trial: objective(trial, samples=samples, epochs=epochs), n_trials=trials)


def main() -> None:
    """Search, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--trials", type=int, default=3, help="of each process (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1920)
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    logging.getLogger("optuna").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as directory:
        journal = Path(directory) / "study.log"
        open_study(journal)
        spawn = multiprocessing.get_context("spawn")
        work_of_each = (journal, arguments.trials, arguments.samples, arguments.epochs)
        processes = [spawn.Process(target=work, args=work_of_each) for _ in range(arguments.processes)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        trials = open_study(journal).trials
        for trial in trials:
            print(f"trial {trial.number}: rate {trial.params['rate']:.4f}, {trial.state.name.lower()}")
        best = open_study(journal).best_trial
    print(f"best of {len(trials)} trials: rate {best.params['rate']:.4f} with an accuracy of {best.value:.2f}")


if __name__ == "__main__":
    main()
