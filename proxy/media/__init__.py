"""Media codecs: what an image, a sound, a film or a file is, and smaller versions of it.

Promises: bytes in, bytes out; no I/O, no network, no file is ever opened on the word of the data;
nothing raises on broken or hostile data (the answer is None or an empty list); every decode is
bounded by a named limit. Pillow, PyAV and pypdf are imported when first needed.
"""
