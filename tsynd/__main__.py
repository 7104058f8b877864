"""``python -m tsynd``."""

from tsynd.cli import main

main()
