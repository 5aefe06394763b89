"""python -m tests.fuzz: see the package's text."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

_ROOM = tempfile.mkdtemp(prefix="loraplex-fuzz-")
# Before the libraries are imported: no hub, one thread, and nothing of theirs in the user's folders.
os.environ.update(
    HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", HF_HOME=f"{_ROOM}/home",
    LORAPLEX_CACHE=f"{_ROOM}/cache", MPLCONFIGDIR=f"{_ROOM}/mpl", MPLBACKEND="agg", TMPDIR=f"{_ROOM}/tmp",
    COLUMNS="100",
)  # fmt: skip
for _name in ("home", "cache", "mpl", "tmp"):
    Path(_ROOM, _name).mkdir()
tempfile.tempdir = None
_SAVED = 500
"""Cases between two notes of how far a campaign has come."""


def main() -> int:
    """Run a campaign, one case, or the self-check; 1 if there are findings."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description="Fuzz loraplex.")
    parser.add_argument("--seed", type=int, default=0, help="of all choices")
    parser.add_argument("--cases", type=int, default=400, help="how many")
    parser.add_argument("--first", type=int, default=0, help="index of the first case")
    parser.add_argument("--kinds", help="only these, with commas between them")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument("--out", type=Path, help="keep each finding's folder, and continue there when called again")
    parser.add_argument("--case", metavar="SEED:INDEX", help="run this case alone and print what it did")
    parser.add_argument("--self-check", action="store_true", help="then see that the cases find broken versions")
    args = parser.parse_args()

    import torch
    import transformers

    from tests.fuzz.campaign import KINDS, Campaign, kind_of, missed_mutants
    from tests.fuzz.room import furnish

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    room = furnish(Path(_ROOM))
    if args.case is not None:
        return _one(args.case, room)
    kinds = set(args.kinds.split(",")) if args.kinds else set(KINDS)
    indices = (index for index in range(args.first, sys.maxsize) if kind_of(index) in kinds)
    chosen = [index for _, index in zip(range(args.cases), indices, strict=False)]
    campaign = Campaign(args.seed, room, None if args.out is None else args.out.absolute())
    campaign.resume()
    for start in range(campaign.done, len(chosen), _SAVED):
        campaign.run(chosen[start : start + _SAVED], args.jobs)
        campaign.save()
    print(f"\n{campaign.summary()}", flush=True)
    missed = []
    if args.self_check:
        print("\nbroken versions of the package, and what finds them:")
        missed = missed_mutants(campaign, chosen)
        print(f"{len(missed)} of them not found")
    shutil.rmtree(_ROOM, ignore_errors=True)
    return 1 if campaign.findings or missed else 0


def _one(case: str, room: object) -> int:
    from tests.fuzz.campaign import run_case
    from tests.fuzz.watch import Watch

    seed, _, index = case.partition(":")
    place = Path(_ROOM, "case")
    place.mkdir()
    result = run_case(int(seed), int(index), room, place, Watch())  # type: ignore[arg-type]
    print(json.dumps(vars(result), indent=2))
    print(f"folder: {place}")
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
