"""What to do about a source that cannot be converted: the hints that several errors share."""

DOWNLOAD_AGAIN = "download the checkpoint again"
ANOTHER_MODEL = "use another model: libllama cannot compute this one"
