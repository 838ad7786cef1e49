"""The encoder: images and words in, unit vectors of one joint space out. Torch; no Ray, no FAISS.

    preprocess   file bytes -> uint8 pixels, and boxes back to the whole image
    backbone     CLIP's vision tower without its pooling layer
    pooling      that pooling layer, with any slots as its queries
    heads        clip, dense, cluster: the heads without training; sum_clip: the head with learnable slots
    kmeans       spherical k-means of many images at once
    boxes        where in the image a slot looks, and which slots say the same
    text         names -> vectors, through an ensemble of prompts
    catalog      what open_clip knows: models, weights, how each was trained
    bundle       an encoder on disk, and its fingerprint; `encoder_config` is its encoder.toml
    sources      where bundles come from: a folder, or open_clip's names and files
    towers       open_clip's model, built and filled with weights
    encoder      all of it together

Importing a module of this package imports torch only where tensors are its subject: `bundle`, `sources`,
`catalog`, `preprocess` and `text` stay light, so that a wrong setting is answered at once.
"""
