"""The hook: times the loaders of a program that knows nothing of it, and feeds the program as a measurement wants it.

It runs in the user's Python, before the user's program, and so needs nothing but Python. What to do is in the
environment (`config`); what was found goes to a file for each process (`runtime`).

Without sections to measure the program runs as it is, and only the time in and between its loaders' `__next__` is taken
(`seen`). With some, the loader that is measured hands out minibatches section by section (`plan`), and then the process
ends, there and then: what follows an epoch, such as saving a model, never runs.
"""

from __future__ import annotations
