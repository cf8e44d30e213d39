"""The live executor: replicas on Ray send each row as a request.

in the driver        executor.py, live_run.py, replicas.py, placement.py, cluster.py, ray_session.py, scratch.py
Dispatcher actor     dispatcher.py, feed.py, ray_dataset.py, queue.py, lease_table.py, pace.py, crash_trial.py,
                     admission.py
Worker actors        worker.py, memory_limit.py, recorder.py, flusher.py, refusals.py, engine_journal.py, secrets.py
other actors         rate_limiter.py, remote_index.py
shared               protocol.py, byte_limits.py
"""
