"""What a person sees and touches: plots and, for the notebooks, the steps between them.

Nothing imports this room; it may import everything.
"""
