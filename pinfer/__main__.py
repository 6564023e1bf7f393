"""``python -m pinfer``: the command line without the installed script."""

from pinfer.cli.app import main

if __name__ == "__main__":
    main()
