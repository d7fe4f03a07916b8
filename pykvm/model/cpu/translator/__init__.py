"""Translation of hot guest code to Python functions.

The plain interpreter is the reference; this package only saves it work.  A *trace* is a run of instructions
from one page, followed along its likely path, which may close on itself as a loop (``trace.py``).  Each
instruction with a template (``templates.py``, ``branches.py``) becomes a few lines of Python on local
variables (``emitter.py``), status flags are computed where somebody can see them (``lazyflags.py``), and
memory is reached through arrays over guest pages (``views.py``).  Whatever is not plain sailing (a page that
is not translated yet, watched, or no memory, an access across pages, a violated limit) leaves the function
with the registers as they were before that instruction, and the interpreter executes it.
"""
