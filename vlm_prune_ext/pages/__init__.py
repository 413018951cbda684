"""Pages for a browser: what a sweep found, and one question at a time; both work offline."""
