"""Frozen models, one file each: what turns sound into codes, latents or features, and back.

None of them is trained here. A codec knows the bricks of models/parts and other codecs, never a backbone; a
backbone imports the codecs that it needs.
"""
