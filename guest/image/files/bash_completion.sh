# Programmable completion, read at the first TAB that needs it: at login it would cost every shell
# over a megabyte of memory and more time than everything else together.
if [ -n "${BASH_VERSION-}" ] && [ -n "${PS1-}" ] && [ -z "${BASH_COMPLETION_VERSINFO-}" ]; then
  if shopt -q progcomp && [ -r /usr/share/bash-completion/bash_completion ]; then
    _load_bash_completion() {
      complete -r -D
      unset -f _load_bash_completion
      . /usr/share/bash-completion/bash_completion
      # 124: bash looks the completion up again, and now finds it
      return 124
    }
    complete -D -F _load_bash_completion
  fi
fi
