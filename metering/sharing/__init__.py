"""Energy sharing: what each member of a community gets of the others' surplus in a slot, and what that costs."""
