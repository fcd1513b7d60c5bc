"""The commands, one file each; a file is imported when its command is called.

Each has ``main(args)``, which returns an exit status or None for success.
"""
