"""``agentflow ui``: one local page that shows runs and asks people. Starlette and uvicorn are imported in here only.

From the outside in: ``serve.py`` binds and runs, ``guard.py`` decides who may ask, ``routes.py`` answers in JSON,
``live.py`` tells that something has changed. What the answers hold: ``board.py`` a run with its steps, ``detail.py``
one step, ``inbox.py`` tasks. ``static/`` is the page; nothing of it comes from anywhere else.
"""
