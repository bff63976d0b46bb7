"""Tests run from anywhere: the flat modules of the kit are found beside this folder."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
