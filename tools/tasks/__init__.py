"""Three training tasks as in the paper (Mohan et al., VLDB 2021): image and audio classification, object detection.

They know nothing of coordlfs.
"""
