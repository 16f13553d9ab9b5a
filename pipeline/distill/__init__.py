"""Stage two: students trained from the cache. Never imports `teachers` or `caching`."""
