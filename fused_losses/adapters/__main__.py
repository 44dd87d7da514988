"""``python -m fused_losses.adapters [FRAMEWORK ...]``: the slots of installed frameworks, their numbers beside ours.

Exit code 1 if a difference is beyond its tolerance, a slot is not where it was, or a framework that was named could not
be compared.
"""

from __future__ import annotations

import argparse
import sys

from . import comparison
from .comparison import FRAMEWORKS

HEAD = f"{'slot':58} {'case':30} {'largest difference':28} {'theirs':>10} {'ours':>10}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_losses.adapters", description=__doc__.split("\n")[0])
    parser.add_argument("framework", nargs="*", help=f"some of {', '.join(FRAMEWORKS)}; all if none is named")
    named = parser.parse_args().framework
    chosen = named or list(FRAMEWORKS)
    if unknown := [name for name in chosen if name not in FRAMEWORKS]:
        parser.error(f"framework must be one of {', '.join(FRAMEWORKS)}, got {', '.join(unknown)}")
    fine = [shown(framework, bool(named)) for framework in chosen]  # all of them, whatever the first says
    return 0 if all(fine) else 1


def shown(framework: str, wanted: bool) -> bool:
    """Prints the framework's table; whether all is within tolerance, and there, if it is wanted."""
    version = comparison.version(framework)
    name = f"{FRAMEWORKS[framework]} {version or ''}".rstrip()
    found, fine, head = comparison.comparisons(framework), True, f"\n{name}\n{HEAD}\n"
    while True:
        try:  # each when the one before has run: what they run in may be theirs to make and to take down
            each = next(found, None)
        except ImportError as error:  # of the framework, or of what it needs
            if (error.name or "").startswith("fused_losses"):
                raise
            print(f"\n{name}: not compared, {error if version else 'it is not installed'}")
            return not wanted
        except RuntimeError as error:
            print(f"\nFAILED {error}")
            return False
        if each is None:
            return fine
        compared = comparison.run(each)
        within = compared.worst <= each.tolerance
        fine &= within
        worst_of = max(compared.differences, key=lambda key: compared.differences[key])
        theirs, ours = (f"{1e3 * s:.2f} ms" for s in compared.seconds)
        worst = f"{compared.worst:.1e} {worst_of}{'' if within else ' WRONG'}"
        print(f"{head}{each.slot:58} {each.case:30} {worst:28} {theirs:>10} {ours:>10}", flush=True)
        head = ""


if __name__ == "__main__":
    sys.exit(main())
