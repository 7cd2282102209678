_tracklight() {
  local IFS=$'\n'
  COMPREPLY=($('PYTHON' -P -m tracklight.commands.completion "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
}
complete -o nospace -o default -F _tracklight tracklight
