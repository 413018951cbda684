"""What programs and people outside this repository rely on, frozen.

``frozen/*.json`` was written once from real, small runs (``python -m tests.contract.observe``).
The tests hold every later version to it: more is always fine, less or other is not. A name that
changed on purpose stands in :data:`tests.contract.test_options.UNIFIED`.
"""
