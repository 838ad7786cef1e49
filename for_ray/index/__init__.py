"""The index: numpy, FAISS and Lance; no Ray, no torch.

plan.py       how many vectors → codec, lists, segments, bytes: pure arithmetic
codec.py      trains the one codec that all segments of an encoder share
segment.py    vectors → one immutable FAISS file
search.py     memory-mapped segments; the k best images, re-ranked exactly
snapshots.py  publishes a state of the index, and finds the published ones
"""
