"""The settings of one run and how a run says no. Pure data: it reads no dataset, loads no library and knows no
device."""
