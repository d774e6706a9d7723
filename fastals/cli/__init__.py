"""The command line: ``fastals finetune``, ``fastals report`` and ``fastals bench``."""
