"""The settings of one run, and the failures that end it.

Pure data: it reads no dataset, loads no library and knows no device.
"""
