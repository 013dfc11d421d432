"""Captioning: images become captions, one text file beside each image.

    captioner        the Captioner protocol, and the loop over the pictures of a folder
    opening          a folder or file -> the captioner it holds; download fetches one when asked to
    wd_tagger, chat_model, florence (florence_legacy), blip    local models, loaded by local_model; limits in asking
    server (server_address), vision_language    a server, a connected model
    hinted, later    captioners made of others
    style, request   what they are asked
    text, tags, trigger, exclusion, replacement, finish    what they said -> the caption
    caption_file, caption_log, sidecar    the files: whose each is, backed up, written, taken back
    find_replace     what the review changes in many captions at once

Training reads these files and knows nothing of how they came to be.
"""
