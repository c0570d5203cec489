"""`kelp report`: one page about a folder of masks, to attach to a paper."""
