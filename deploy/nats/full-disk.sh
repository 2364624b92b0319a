#!/bin/sh
# full-disk.sh FOLDER MARKER PROCESS: fails while the disk of FOLDER has less than 16 MiB, and notes that in MARKER.
# nats-server stops writing to a stream at its first failed write and goes on only after a start. So once there is room
# again PROCESS is ended, and who keeps it alive starts it.
set -eu
free_kib=$(df -Pk "$1" | awk 'NR == 2 { print $4 }')
if [ "$free_kib" -lt 16384 ]; then
  : >"$2"
  echo "the disk of $1 has $free_kib KiB left"
  exit 1
fi
if [ -e "$2" ]; then
  rm "$2"
  echo "the disk of $1 has room again: process $3 is started anew"
  kill -TERM "$3"
fi
