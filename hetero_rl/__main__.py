"""`python -m hetero_rl`."""

from hetero_rl.cli import main

if __name__ == "__main__":
    main()
