"""``python -m pinfer``: the command line without the installed script."""

from pinfer.cli import main

if __name__ == "__main__":
    main()
