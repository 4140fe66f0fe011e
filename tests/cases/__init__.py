"""The cases that users of other tools have reported: one test for each, whose id is the name of the case."""
