"""`kelp compare`: does slicing help these scenes, at what cost, and how sure is that?"""
