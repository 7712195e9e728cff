"""One module per kernel interface, with no policy in it.

Unless a function takes a namespace explicitly, it acts in the network namespace of the calling thread.
"""
