"""The engine: carries a method out on any model, through hooks that come off again."""
