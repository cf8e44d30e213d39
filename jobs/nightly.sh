#!/bin/sh
# The run of one night over the output of another job. Waits until yesterday's output of that job is complete, and then sends
# its rows to a model. The result is the exit status of the run; 4 if the other job did not complete in time.
#
#   jobs/nightly.sh IN OUT [run file, flags and keys of eagleray infer]
#   jobs/nightly.sh /data/answers /data/scores --env-file keys.env jobs/nightly.yaml
#   DAY=2026-11-25 jobs/nightly.sh …      another day
#
# It reads IN/2026-11-25/data and writes OUT/2026-11-25. IN and OUT may be URLs of a store.
set -u
PATH=$(dirname "$0")/../.venv/bin:$PATH
day=${DAY:-$(date -d yesterday +%Y-%m-%d)}
in=$1/$day out=$2/$day
shift 2

keys= before=
for word; do # the store of the other job may need the keys, too
  [ "$before" = --env-file ] && keys=$word
  case $word in --env-file=*) keys=${word#--env-file=} ;; esac
  before=$word
done
eagleray wait "$in" --timeout "${TIMEOUT:-6h}" ${keys:+--env-file "$keys"}
status=$?
[ $status -eq 0 ] || [ $status -eq 3 ] || exit $status # 3: complete, and some of its rows failed

exec eagleray infer "$@" dataset.path="$in/data" output.path="$out"
