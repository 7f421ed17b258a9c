"""The example is imported from the repository's root, as its commands do; a source distribution has no examples."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
collect_ignore_glob = [] if (ROOT / "examples").is_dir() else ["test_*.py"]
