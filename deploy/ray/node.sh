# What every shell on a node of the Ray cluster has set, `ray start` and its workers with it. install.sh has ~/.bashrc read it.

export PATH="$HOME/tandem-venv/bin:$PATH"
# Ray's ports take calls with the token in ~/.ray/auth_token alone, which `ray up` copies to every node.
export RAY_AUTH_MODE=token
# `ray job stop` kills what has not ended by then; Ray's own default of 3 s is less than a service needs to drain.
export RAY_JOB_STOP_WAIT_TIME_S=60
export RAY_USAGE_STATS_ENABLED=0
