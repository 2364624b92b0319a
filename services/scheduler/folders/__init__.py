"""The folders of ended jobs in the artifact store: what stays in each, and which node cleans it.

It touches no file and knows no file's name.
"""
