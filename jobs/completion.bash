# Completion of eagleray in bash. `eagleray completion bash` prints this file.
_eagleray() {
    local IFS=$'\n' program="${1/#\~/$HOME}"
    COMPREPLY=($("$program" completion --complete bash "$COMP_WORDBREAKS" "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
    case "${COMPREPLY[0]}" in
        :files) COMPREPLY=(); compopt +o nospace -o default ;;
        :directories) COMPREPLY=(); compopt +o nospace -o dirnames ;;
    esac
}
complete -o nospace -F _eagleray eagleray
