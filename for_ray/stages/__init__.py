"""The stages of a job. They never import each other: they meet through what `schema.py` describes.

listing     bucket, folder, tars or manifest → what there is
diff        what there is against images.lance → the gap
encode      the gap → rows of images.lance
label       the gap → rows of labels.lance
build       rows → FAISS segments
"""
