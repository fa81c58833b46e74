"""A search with Lightning: a process for each learning rate, all on one node, which share their prep.

python examples/lightning_search.py         (pip install 'coordlfs[loader]' lightning)

To Lightning, CoordinatedLoader is a loader like any other: `Trainer.fit` takes it as it is.
"""

from __future__ import annotations

import argparse
import multiprocessing
import warnings
from contextlib import closing

import lightning
import torch
from coordlfs_loader import CoordinatedLoader
from pictures import Pictures, accuracy, network
from torch import Tensor
from torch.utils.data import DataLoader

GROUP = "lightning-example"


class Stripes(lightning.LightningModule):
    """The network, as Lightning trains it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.network, self.rate = network(), rate

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The loss of a batch."""
        pictures, kinds = batch
        return torch.nn.functional.cross_entropy(self.network(pictures), kinds)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)


def trial(rate: float, samples: int, epochs: int) -> None:
    """One process: train with a learning rate and print how well that went."""
    lightning.seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    model = Stripes(rate)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Every trial of the node gives the same group, data set, batch size and seed. Nothing else is needed to share.
    with closing(
        CoordinatedLoader(Pictures(samples), batch_size=32, group=GROUP, num_workers=1, shuffle=True, seed=0)
    ) as loader:
        trainer.fit(model, loader)
    unseen = DataLoader(Pictures(200, first=1_000_000), 100)
    print(
        f"rate {rate:.4f}: accuracy {accuracy(model.network, unseen):.2f} after {trainer.current_epoch} epochs",
        flush=True,
    )


def main() -> None:
    """Train with several learning rates at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.03, 0.3])
    parser.add_argument("--samples", type=int, default=1920)
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=trial, args=(rate, arguments.samples, arguments.epochs)) for rate in arguments.rates
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a trial failed")


if __name__ == "__main__":
    main()
