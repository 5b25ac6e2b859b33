"""`python -m hetero_rl`."""

from hetero_rl.cli import main

main()
