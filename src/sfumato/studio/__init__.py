"""The studio: what the commands do, in the browser.

A form becomes the words of a command (`forms`, `actions`), a queue runs one at a time in a process of its own (`jobs`,
`child`), and what it wrote is shown with its record and the command (`views`). `app` lays the tabs out, `serve` answers
on this machine only.
"""
