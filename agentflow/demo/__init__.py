"""What `agentflow demo` runs. Begin with ``orders.py``: the workflow, as a user would write it.

``shop.py`` is the world outside it, ``model.py`` the scripted model, ``worker.py`` the process that is killed.
"""
