"""`python -m coordlfs_tools.soak`: arguments and printing, nothing else."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
from pathlib import Path

from coordlfs_tools.lab.errors import LabError
from coordlfs_tools.soak.faults import KINDS
from coordlfs_tools.soak.run import Options, Outcome, Soak

from coordlfs.kernel import process


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(",")) if text else ()
    if unknown := set(kinds) - set(KINDS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: there are {', '.join(KINDS)}")
    return kinds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m coordlfs_tools.soak",
        description="Readers check every byte that mounts give them while processes are killed and sources change."
        " The exit status is 1 if any job would have noticed.",
    )
    parser.add_argument("--minutes", type=float, help="end after so long (default: 5, if --kills is not given)")
    parser.add_argument("--kills", type=int, help="end after so many kills of servers, and a quarter of keepers")
    parser.add_argument("--seed", type=int, help="what is drawn by lot is drawn so again (default: another each time)")
    parser.add_argument(
        "--faults",
        type=_kinds,
        default=KINDS,
        metavar="KIND,KIND…",
        help=f"default: {','.join(KINDS)}; with changes,kills files change ten times as often",
    )
    parser.add_argument("--files", type=int, default=240, help="of the dataset (default: %(default)s)")
    parser.add_argument("--readers", type=int, default=3, help="of each mount (default: %(default)s)")
    parser.add_argument("--torch", action="store_true", help="and a DataLoader with two workers for each mount")
    parser.add_argument("--hang", type=float, default=60.0, help="seconds after which a read hangs (default: 60)")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where, on a disk (default: %(default)s)")
    return parser


def _report(outcome: Outcome, seed: int, kept: Path) -> None:
    o = outcome
    print(f"{o.seconds:.0f} s, seed {seed}; {o.dataset / 1e6:.0f} MB in files, {o.cache / 1e6:.0f} MB of cache a mount")
    print("done: " + ", ".join(f"{count} {what}" for what, count in sorted(o.counts.items())))
    print(
        f"read: {o.epochs} epochs, {o.files} files, {o.nbytes / 1e9:.2f} GB; errors that faults explain: {o.expected}"
    )
    for mount, nbytes in o.source_per_epoch.items():
        print(f"read from the source by {mount}: {nbytes / 1e6:.0f} MB a reader's epoch")
    for mount, (nbytes, bad) in o.from_disk.items():
        print(f"read from the disk tier by {mount}: {nbytes / 1e6:.0f} MB; {bad} blocks were found to be damaged")
    print(
        f"seen: {o.wrong} with wrong bytes, {o.errors} errors, {o.hangs} hangs; the longest read took {o.longest:.1f} s"
    )
    for problem in o.problems:
        print(f"problem: {problem}")
    if kept.exists():
        print(f"all that is known of the wrong reads: {kept}")
    print("PASS" if o.passes else f"FAIL (--seed {seed})")


def main() -> int:
    """Soak as the command line says; the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing stays mounted
    a = _parser().parse_args()
    if os.geteuid():
        print("soak: mounting needs root: run as root", file=sys.stderr)
        return 2
    seed = secrets.randbelow(1 << 32) if a.seed is None else a.seed
    minutes = 5.0 if a.minutes is None and a.kills is None else a.minutes
    options = Options(a.dir, minutes, a.kills, seed, a.faults, a.files, a.readers, a.torch, a.hang)
    process.unshare_mounts()  # or who makes a mount namespace meanwhile would keep the mounts
    try:
        outcome = Soak(options).run()
    except LabError as e:
        print(f"soak: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    _report(outcome, seed, options.kept)
    return 0 if outcome.passes else 1


if __name__ == "__main__":
    sys.exit(main())
