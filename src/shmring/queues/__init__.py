"""Ring and the Queue family: handles, codecs, asyncio, waiting on several."""
