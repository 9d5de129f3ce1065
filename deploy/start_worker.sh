#!/bin/bash
# Starts Ray on a worker of the head at $1. `ray down` stops Ray only on the head of such a cluster: a worker's raylet
# notices within 30 s and ends; what it would leave behind (its log monitor, for ever) is then stopped here.
ulimit -n 65536
export RAY_gcs_rpc_server_reconnect_timeout_s=30
ray start --address="$1:6379" || exit 1
setsid bash -c 'tail --pid="$(pgrep -n -x raylet)" -f /dev/null; timeout 5 bash -c "</dev/tcp/$0/6379" || ray stop' \
  "$1" </dev/null >/dev/null 2>&1 &
