"""Property tests try the same examples each time, so that a change is judged by what it changes.

``pytest --hypothesis-profile=new tests/unit`` tries others: what it finds becomes an example of its own.
"""

from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.register_profile("new", derandomize=False)
settings.load_profile("same")
