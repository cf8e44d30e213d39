#compdef eagleray
# Completion of eagleray in zsh. `eagleray completion zsh` prints this file.
_eagleray() {
    local program=${(Q)words[1]} line
    local -a found open open_shown closed closed_shown
    program=${program/#\~/$HOME}
    found=("${(@f)$($program completion --complete zsh "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)}")
    case $found[1] in
        :files) compset -P '*='; _files; return ;;
        :directories) compset -P '*='; _files -/; return ;;
    esac
    for line in $found; do
        [[ -n $line ]] || continue
        if [[ ${line%%$'\t'*} == *[=./] ]]; then
            open+=("${line%%$'\t'*}")
            open_shown+=("${${line/$'\t'/  -- }%  -- }")
        else
            closed+=("${line%%$'\t'*}")
            closed_shown+=("${${line/$'\t'/  -- }%  -- }")
        fi
    done
    (( $#open )) && compadd -S '' -l -d open_shown -a open
    (( $#closed )) && compadd -l -d closed_shown -a closed
}
if [[ $funcstack[1] == _eagleray ]]; then
    _eagleray "$@"
else
    compdef _eagleray eagleray
fi
