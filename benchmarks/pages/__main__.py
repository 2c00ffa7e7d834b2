"""Write all generated pages: `make pages`.

    python -m benchmarks.pages [--check]

--check writes nothing, names the stale pages, and exits with status 1 if there are any.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.pages import generated


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = [page for page in generated.PAGES if page.path.read_text() != page.render()]
    for page in stale:
        print(f"{'stale' if options.check else 'written'}: {page.path}")
        if not options.check:
            page.path.write_text(page.render())
    sys.exit(1 if stale and options.check else 0)


if __name__ == "__main__":
    main()
